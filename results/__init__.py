"""From run folders to tables. Imports no torch: results are read where nothing can be trained."""
