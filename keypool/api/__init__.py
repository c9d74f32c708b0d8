"""The API, independent of the HTTP server: operations, authorization, errors, OpenAPI."""
