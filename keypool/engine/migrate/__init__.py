"""Moving a whole pool between a data file and Valkey."""
