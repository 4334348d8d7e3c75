"""The command line: training and benchmarks. May import anything."""
