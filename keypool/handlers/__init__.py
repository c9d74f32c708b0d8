"""What Tornado calls: HTTP in, HTTP out, and no rule of the pool."""
