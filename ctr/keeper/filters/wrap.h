#include <stddef.h>
#include <seccomp.h>

/* coracle_use makes the calls be noted and compared with the record at data. */
void coracle_use(const void *data, size_t len);

/* coracle_record makes the calls and the program be written to fd; the process ends then. */
void coracle_record(int fd);
