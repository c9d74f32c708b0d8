"""HTTP: the API and its two servers, the fast one and Tornado's."""
