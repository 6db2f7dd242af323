"""The block graph: nodes, the edges between them, and the one loop that moves data through it."""
