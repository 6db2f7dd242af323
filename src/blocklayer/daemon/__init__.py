"""The live daemon: the graph, its devices, jobs, exports and objects behind one async API."""
