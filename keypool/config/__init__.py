"""Settings, tokens and limits: read once at the start, then passed to the packages that need them."""
