"""All that knows DVC's Python interface: the graph of dvc.yaml, the repository and its locks, running one stage."""
