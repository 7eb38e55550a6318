"""What is known of each model family without loading it: one file per family, and the table of them."""
