"""A trained network as a file that needs no segjax: what is exported, the formats, and the page beside it."""
