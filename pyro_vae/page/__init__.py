"""Page: a run, or several side by side, as one HTML file without external resources.

`summary` collects the values of a run, `explorer` decodes planes of latents in advance, `render`
fills the templates, and `write` writes the file.
"""
