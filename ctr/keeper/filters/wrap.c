//go:build cgo && seccomp

#define _GNU_SOURCE
#include <errno.h>
#include <stdint.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>
#include <seccomp.h>
#include "wrap.h"

/*
 * One filter at a time is followed: a container's init has one, and calls libseccomp from one thread. A second one, and
 * any call that is not expected, ends the following: what was put off is made up for, and the rest passes as it is.
 */

enum { CALL_INIT = 1, CALL_ARCH, CALL_ATTR, CALL_RULE };

/* A call as it is noted. Conditions of a rule follow it. */
struct call {
	uint32_t what;
	uint32_t action; /* of a filter or a rule; the architecture; the attribute */
	int32_t number;  /* the system call */
	uint32_t value;  /* of the attribute; how many conditions */
};

/* A record is this, the calls, and the program. */
struct record {
	uint32_t magic;
	uint32_t calls_len;
	uint32_t program_len;
	uint32_t zero;
};

#define MAGIC 0x31464343 /* CCF1 */

static const struct record *kept;
static int record_fd = -1;

static scmp_filter_ctx followed; /* NULL: none */
static uint8_t *calls;
static size_t calls_len, calls_cap;

void coracle_use(const void *data, size_t len)
{
	const struct record *r = data;

	if (len < sizeof(*r) || r->magic != MAGIC || r->calls_len == 0 || r->program_len == 0 ||
	    len - sizeof(*r) < (size_t)r->calls_len + r->program_len)
		return;
	kept = r;
}

void coracle_record(int fd) { record_fd = fd; }


extern scmp_filter_ctx __real_seccomp_init(uint32_t def_action);
extern void __real_seccomp_release(scmp_filter_ctx ctx);
extern int __real_seccomp_arch_add(scmp_filter_ctx ctx, uint32_t arch);
extern int __real_seccomp_arch_remove(scmp_filter_ctx ctx, uint32_t arch);
extern int __real_seccomp_attr_set(scmp_filter_ctx ctx, enum scmp_filter_attr attr, uint32_t value);
extern int __real_seccomp_rule_add_array(scmp_filter_ctx ctx, uint32_t action, int number, unsigned int count, const struct scmp_arg_cmp *args);
extern int __real_seccomp_rule_add_exact_array(scmp_filter_ctx ctx, uint32_t action, int number, unsigned int count, const struct scmp_arg_cmp *args);
extern int __real_seccomp_syscall_priority(scmp_filter_ctx ctx, int number, uint8_t priority);
extern int __real_seccomp_merge(scmp_filter_ctx dst, scmp_filter_ctx src);
extern int __real_seccomp_reset(scmp_filter_ctx ctx, uint32_t def_action);
extern int __real_seccomp_load(const scmp_filter_ctx ctx);
extern int __real_seccomp_export_bpf(const scmp_filter_ctx ctx, int fd);
extern int __real_seccomp_export_pfc(const scmp_filter_ctx ctx, int fd);

/* note adds a call to those of the followed filter. */
static int note(struct call c, const struct scmp_arg_cmp *args)
{
	size_t tail = c.what == CALL_RULE ? c.value * sizeof(*args) : 0;

	if (calls_len + sizeof(c) + tail > calls_cap) {
		size_t cap = 2 * calls_cap + sizeof(c) + tail + 16384;
		uint8_t *grown = realloc(calls, cap);
		if (!grown)
			return -ENOMEM;
		calls = grown;
		calls_cap = cap;
	}
	memcpy(calls + calls_len, &c, sizeof(c));
	if (tail)
		memcpy(calls + calls_len + sizeof(c), args, tail);
	calls_len += sizeof(c) + tail;
	return 0;
}

/* settle makes the calls that were put off and follows the filter no longer. */
static int settle(scmp_filter_ctx ctx)
{
	size_t at = 0;
	int rc = 0;

	if (!followed || ctx != followed)
		return 0;
	followed = NULL;
	while (rc == 0 && at < calls_len) {
		struct call c;
		struct scmp_arg_cmp args[6];

		memcpy(&c, calls + at, sizeof(c));
		at += sizeof(c);
		if (c.what != CALL_RULE)
			continue; /* was made at once */
		memcpy(args, calls + at, c.value * sizeof(*args));
		at += c.value * sizeof(*args);
		rc = __real_seccomp_rule_add_array(ctx, c.action, c.number, c.value, args);
	}
	return rc;
}

scmp_filter_ctx __wrap_seccomp_init(uint32_t def_action)
{
	scmp_filter_ctx ctx = __real_seccomp_init(def_action);

	if (!ctx || followed || (!kept && record_fd < 0))
		return ctx;
	calls_len = 0;
	if (note((struct call){ CALL_INIT, def_action, 0, 0 }, NULL) == 0)
		followed = ctx;
	return ctx;
}

void __wrap_seccomp_release(scmp_filter_ctx ctx)
{
	if (ctx == followed)
		followed = NULL;
	__real_seccomp_release(ctx);
}

int __wrap_seccomp_arch_add(scmp_filter_ctx ctx, uint32_t arch)
{
	int rc;

	if (!followed || ctx != followed)
		return __real_seccomp_arch_add(ctx, arch);
	rc = note((struct call){ CALL_ARCH, arch, 0, 0 }, NULL);
	return rc ? rc : __real_seccomp_arch_add(ctx, arch);
}

int __wrap_seccomp_attr_set(scmp_filter_ctx ctx, enum scmp_filter_attr attr, uint32_t value)
{
	int rc;

	if (!followed || ctx != followed)
		return __real_seccomp_attr_set(ctx, attr, value);
	rc = note((struct call){ CALL_ATTR, attr, 0, value }, NULL);
	return rc ? rc : __real_seccomp_attr_set(ctx, attr, value);
}

int __wrap_seccomp_rule_add_array(scmp_filter_ctx ctx, uint32_t action, int number, unsigned int count, const struct scmp_arg_cmp *args)
{
	if (!followed || ctx != followed)
		return __real_seccomp_rule_add_array(ctx, action, number, count, args);
	if (count > 6)
		return -EINVAL;
	return note((struct call){ CALL_RULE, action, number, count }, args);
}

static int write_all(int fd, const void *data, size_t len)
{
	const uint8_t *p = data;

	while (len > 0) {
		ssize_t n = write(fd, p, len);
		if (n < 0 && errno == EINTR)
			continue;
		if (n < 0)
			return -errno;
		p += n;
		len -= n;
	}
	return 0;
}

/* keep writes the record: its head last, so that one which is not whole is none. */
static int keep(const scmp_filter_ctx ctx)
{
	struct record r = { MAGIC, calls_len, 0, 0 };
	off_t end;
	int rc;

	if (lseek(record_fd, sizeof(r), SEEK_SET) < 0)
		return -errno;
	if ((rc = write_all(record_fd, calls, calls_len)) || (rc = __real_seccomp_export_bpf(ctx, record_fd)))
		return rc;
	if ((end = lseek(record_fd, 0, SEEK_END)) < 0)
		return -errno;
	r.program_len = end - sizeof(r) - calls_len;
	if (pwrite(record_fd, &r, sizeof(r), 0) != sizeof(r))
		return -EIO;
	return 0;
}

int __wrap_seccomp_export_bpf(const scmp_filter_ctx ctx, int fd)
{
	int rc, following = followed && ctx == followed;

	if (following && kept && kept->calls_len == calls_len && memcmp(kept + 1, calls, calls_len) == 0) {
		return write_all(fd, (const uint8_t *)(kept + 1) + calls_len, kept->program_len);
	}
	if ((rc = settle(ctx)))
		return rc;
	if (following && record_fd >= 0) {
		/* All is done: the filter itself would be loaded next, and might refuse even the end. */
		if ((rc = keep(ctx)) == 0)
			_exit(0);
		return rc;
	}
	return __real_seccomp_export_bpf(ctx, fd);
}

/* What libcontainer does not call today. */

int __wrap_seccomp_rule_add_exact_array(scmp_filter_ctx ctx, uint32_t action, int number, unsigned int count, const struct scmp_arg_cmp *args)
{
	int rc = settle(ctx);

	return rc ? rc : __real_seccomp_rule_add_exact_array(ctx, action, number, count, args);
}

int __wrap_seccomp_syscall_priority(scmp_filter_ctx ctx, int number, uint8_t priority)
{
	int rc = settle(ctx);

	return rc ? rc : __real_seccomp_syscall_priority(ctx, number, priority);
}

int __wrap_seccomp_arch_remove(scmp_filter_ctx ctx, uint32_t arch)
{
	int rc = settle(ctx);

	return rc ? rc : __real_seccomp_arch_remove(ctx, arch);
}

int __wrap_seccomp_merge(scmp_filter_ctx dst, scmp_filter_ctx src)
{
	int rc = settle(dst);

	if (rc == 0)
		rc = settle(src);
	return rc ? rc : __real_seccomp_merge(dst, src);
}

int __wrap_seccomp_reset(scmp_filter_ctx ctx, uint32_t def_action)
{
	int rc = settle(ctx);

	return rc ? rc : __real_seccomp_reset(ctx, def_action);
}

int __wrap_seccomp_load(const scmp_filter_ctx ctx)
{
	int rc = settle(ctx);

	return rc ? rc : __real_seccomp_load(ctx);
}

int __wrap_seccomp_export_pfc(const scmp_filter_ctx ctx, int fd)
{
	int rc = settle(ctx);

	return rc ? rc : __real_seccomp_export_pfc(ctx, fd);
}
