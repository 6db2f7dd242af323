"""What the file drivers ask of the operating system: calls, locks, unbuffered access."""
