"""Front ends that serve nodes to others: what all exports have in common, and one part a protocol."""
