"""Front ends that serve nodes to others: what exports have in common, and a part a protocol."""
