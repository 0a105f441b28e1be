"""One module per backend, each with the same two functions: `build` compiles a graph, `open_sessions` opens what was built."""
