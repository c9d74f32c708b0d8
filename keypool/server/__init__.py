"""The program: start-up, serving, processes, shutdown."""
