"""The pool on disk: journal, group commit, the writer process and the data file."""
