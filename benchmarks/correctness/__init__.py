"""Silent errors of fine-tuning, looked for in this project and in its peers, with the same model and records.

`__main__.py` is the command. `inputs.py` makes the model and the records, `columns.py` says which trainers are compared
and with which settings, `running.py` runs them in environments of their own, by the drivers in `drivers/`,
`verdicts.py` holds the bound of each check, and `report.py` writes the tables and draws the picture.
"""
