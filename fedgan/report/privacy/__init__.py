"""What a page and a card say of privacy, as facts and sentences: what is guaranteed, what was found, what is open.

No HTML and no Markdown here: `sections/privacy.py` and `cards/privacy.py` render the same facts.
"""
