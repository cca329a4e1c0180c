// Command guest is what critest's images have beside Debian's busybox: one static program that is, by the name it is
// called by,
//
//   - sh, which executes a command's file where busybox-static's runs its own code: one spec masks /bin/ls and wants
//     the shell's complaint. Everything that is more than one plain command is busybox's affair.
//   - pgrep and ipcs, which Debian's busybox does not have.
//   - nginx and httpd: a web server that shows the marks by which the specs know the two.
//   - nonewprivs, installed set-user-ID: says which user it is.
//   - pause: waits.
//
// It has no state, and it knows nothing of coracle.
package main
