"""The path filter in front of the SuperLink: hospitals reach the fleet API and `/health` through it, nothing else.

rules.py     which request may pass, and which of its headers
once.py      a signed request passes once
share.py     how many requests of one hospital run at once
app.py       passing on, both ways, within bounds
door.py      TLS first, then HTTP
journal.py   what the log says of a refusal
__main__.py  python -m server.filter
"""
