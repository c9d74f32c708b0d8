"""The HTTP server alone, with applications of its own."""
