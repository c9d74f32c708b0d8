"""The two HTTP servers, the fast one and Tornado's, and the API's calls on them."""
