"""What every budget costs: the frontier of peak against time and noise, and the ways to look at it.

`frontier.py` computes it, `memory.py` says who holds how much at which moment of a step; `data.py` writes both as JSON,
`table.py` draws them on a terminal, `picture.py` as a PNG, and `page.py` as a page for a browser.
"""
