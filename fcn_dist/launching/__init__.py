"""Starting the ranks of a job on one host or many, watching over them, and telling how the job ended."""
