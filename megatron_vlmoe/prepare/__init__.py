"""Raw files to indexed datasets."""
