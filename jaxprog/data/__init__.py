"""From files on disk to batches.

preparation makes of a dataset's name its prepared copy: archives, folders,
builders and packs serve it, parts lets long work survive a kill. records,
shards and index are what is read, jpeg, preprocess and policies one image,
batches, workers and loader the way to the devices. signatures, leaks and
verification ask whether the data is right.
"""
