"""One module for each paper: loops over a table's rows on trained models, and appends results rows."""
