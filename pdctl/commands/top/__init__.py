"""`pdctl top`: a service on the screen of a terminal, with keys.

`feed` reads what is shown, `session` joins it with the keys; everything between is pure: `keys` and `view` (what the
user wants), `rates`, `snapshot`, `table` and `topology` (what there is), `board` (the lines of the screen).
"""
