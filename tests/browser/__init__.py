"""The dashboard in real browsers."""
