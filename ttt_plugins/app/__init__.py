"""A page to try adapters on pictures: a stream goes by, the source beside the adapter.

`session` and `pictures` do the work and need nothing beyond the package; `page` draws it with
gradio (the extra ``app``); `space` writes the same page as a Space of the Hugging Face Hub.
"""
