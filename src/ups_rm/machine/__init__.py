"""`ups-rm doctor`: can this machine run the recipe? `facts` looks at the machine, `checks` judges what was seen.

What can't be seen from here is said to be unknown, never assumed.
"""
