"""One self-contained page from the folders of runs, and the same tables as markdown and CSV."""
