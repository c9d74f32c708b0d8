"""The calls of the API, whichever HTTP server carries them: operations, authorization, errors, OpenAPI."""
