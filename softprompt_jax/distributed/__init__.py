"""Several devices, several processes, and files that all of them see.

`mesh` shards weights and batches over devices, `multihost` lets processes agree and stop together, `cloud_files`
reads and writes gs:// and s3:// and holds a run folder there, `folder_lock` keeps a second command out of it.
Begin with `mesh.py`."""
