"""Memory regression checks: what training steps are predicted to take, against a lock file under version control.

`config.py` reads what is checked, `record.py` plans it, `lock.py` keeps it, `compare.py` finds what grew, `formats.py`
says so. `xconv_fx/cli/check.py` is the command.
"""
