#include <stdint.h>

struct floor_paths {
	const char *merged, *overlay, *program;
	int sandbox; /* the network namespace is there already */
};

/* floor_once starts the program in a container of the least kind, and says how long each step took. It returns an errno. */
int floor_once(const struct floor_paths *p, int64_t ns[4]);
