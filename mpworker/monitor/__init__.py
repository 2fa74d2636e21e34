"""Progress, statistics and the views that draw them. Importing it loads no terminal library."""
