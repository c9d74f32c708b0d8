"""Settings, tokens and limits: read once at the start, then handed to the rooms that need them."""
