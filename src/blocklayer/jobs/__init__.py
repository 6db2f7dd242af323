"""Long operations on images: what they copy, in which order, and what they leave behind."""
