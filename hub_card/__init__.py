"""Cards and Spaces: render and push."""
