"""Pages made from a tabular benchmark: replayed searches, and what the runs of every architecture say."""
