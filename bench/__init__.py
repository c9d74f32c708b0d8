"""Benchmarks: what the contract says of time and memory, measured by hand. `./run bench` lists them."""
