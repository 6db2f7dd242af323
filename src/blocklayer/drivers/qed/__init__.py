"""QED: `driver`, and `check` with repair."""
