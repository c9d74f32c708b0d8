"""The dashboard: pages, sign-in, live feed, charts and static files."""
