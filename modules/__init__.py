"""Building blocks of a sharded sequential recommender.

One legend for the whole project: ``B`` sequences, ``L`` positions, ``N`` real positions (padding
removed), ``D`` width, ``V`` catalog rows, ``R`` rows on this rank, ``K`` negatives, ``W`` ranks.
``item_id`` is what the user's log says, ``item`` the dense global index in [0, V), ``row`` an index
local to one shard.
"""
