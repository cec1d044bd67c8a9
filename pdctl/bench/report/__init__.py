"""What a result looks like: text, page, plots, pictures."""
