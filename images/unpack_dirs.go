package images

import (
	"maps"
	"slices"
	"strings"
)

// dirNode is a directory of an archive by the name that the archive gives it. The nodes are a tree and not a map by
// path, so that to forget a directory with all that is in it costs nothing, however often an archive replaces one.
type dirNode struct {
	below   map[string]*dirNode
	meta    *dirMeta // what is to be set on it in the end; nil for a name that is only on the way to others
	implied bool     // it was made because an entry was in it
}

// find returns the node of a path, nil where there is none.
func (d *dirNode) find(path string) *dirNode {
	if path == "" {
		return d
	}
	for part := range strings.SplitSeq(path, "/") {
		if d = d.below[part]; d == nil {
			return nil
		}
	}
	return d
}

// at returns the node of a path, and makes it where there is none.
func (d *dirNode) at(path string) (node *dirNode, made bool) {
	if path == "" {
		return d, false
	}
	for part := range strings.SplitSeq(path, "/") {
		next := d.below[part]
		if next == nil {
			if d.below == nil {
				d.below = map[string]*dirNode{}
			}
			next, made = &dirNode{}, true
			d.below[part] = next
		}
		d = next
	}
	return d, made
}

// drop forgets a path and everything below it.
func (d *dirNode) drop(path string) {
	above, base := "", path
	if cut := strings.LastIndexByte(path, '/'); cut >= 0 {
		above, base = path[:cut], path[cut+1:]
	}
	if parent := d.find(above); parent != nil {
		delete(parent.below, base)
	}
}

// walk calls visit for every node that has something to be set, those below before those above.
func (d *dirNode) walk(path string, visit func(path string, node *dirNode) error) error {
	for _, base := range slices.Backward(slices.Sorted(maps.Keys(d.below))) {
		below := base
		if path != "" {
			below = path + "/" + base
		}
		if err := d.below[base].walk(below, visit); err != nil {
			return err
		}
	}
	if d.meta == nil {
		return nil
	}
	return visit(path, d)
}
