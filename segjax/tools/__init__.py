"""Commands around a run, each also `python -m segjax.NAME`: data, memory and speed looked at; archives; submissions."""
