"""Pictures of layers: colours, and how they are put on a page or on a terminal."""
