// What sampled_convolution_ does, and convolution_jvp on small images: dy_i (+)= conv(x, dW_i) for k sampled tangents
// of the weight, or y = conv(x, W), as an implicit product of matrices: a column is a place of the result in one image,
// a row an input channel and a place of the kernel (a tap).
//
// x is turned so that images lie side by side, and with a lane for each image a row of the matrix is a piece of that:
// it is read where it is. Where a panel has several places, rows that leave the image or a line of it are copied
// together, once for all k and some places at a time. As the columns of a panel belong to few places, a tap that lies
// in the padding for all of them is left out: of a 3x3 kernel on images of 4x4, three rows in ten. A thread draws k
// tangents of some filters into second-level cache and takes them through the panels on the register tile; a weight
// that is there is read where it is.
//
// Floor per tangent and weight element: one draw, and a fused multiply-add for each place that finds it in the image.
// The sums run over channels and taps in order: no bit depends on the number of tangents, images or threads.
#pragma once

#include <cstring>

#include "../arguments/convolution.h"
#include "product.h"

namespace frog::direct {

constexpr int64_t kImages = 64;                    // at a time
constexpr int64_t kTurnedBytes = 4 * 1024 * 1024;  // of more images, in last-level cache
constexpr int64_t kMostImages = 512;               // whose sums stay in second-level cache
constexpr int64_t kCopiedBytes = 8 * 1024 * 1024;  // of copied rows and of lists, in last-level cache
constexpr int64_t kFewestColumns = 512;            // taken together: fewer do not pay for drawing the weight
constexpr int64_t kDrawnBytes = 512 * 1024;        // of tangents, in second-level cache
constexpr int64_t kFewestDrawn = 256;  // elements that follow each other: of normal ones whole groups of 64 are drawn
constexpr int64_t kSumsBytes = 4 * 1024 * 1024;  // of places that wait for further channels
constexpr int64_t kPanelBytes = 16 * 1024;  // of a panel, between two loads of the sums; they stay in first-level cache
constexpr int64_t kStripRows = 96;          // of all tangents, that share the loads of a panel
constexpr int64_t kTaskProducts = int64_t{1} << 18;  // that are worth a thread

// How the results of some images become columns: place by place, and at a place image by image.
struct Columns {
  int64_t lanes = 1;   // columns of a place: as many as images, up to a power of two or to whole vectors
  int64_t width = 1;   // of a panel: several places, or some lanes of one
  int64_t places = 1;  // of a panel
  int64_t panels = 1;  // of a group
  int64_t group = 1;   // places whose sums are collected before they are written

  Columns(int64_t images, int64_t panel, int64_t vector) {
    while (lanes < std::min(images, vector)) lanes *= 2;
    if (images > vector) lanes = ceil_div(images, vector) * vector;
    places = std::max<int64_t>(1, std::max(panel / 2, vector) / lanes);
    width = std::min(panel, places * lanes);
    group = places * ceil_div(std::clamp<int64_t>(512 / lanes, 1, 16), places);
    panels = group / places * parts();
  }
  int64_t parts() const { return ceil_div(places * lanes, width); }  // panels of a place that has several
  int64_t size() const { return group * lanes; }
};

// Panel p of a stretch of groups: its first place, and which columns of it
struct Panel {
  int64_t place, lane, width;

  Panel(const Columns& c, int64_t p)
      : place(p / c.parts() * c.places),
        lane(p % c.parts() * c.width),
        width(std::min(c.width, c.places * c.lanes - lane)) {}
};

// Which columns of a panel find a tap where in the turned image; those beside it find zeros.
struct Piece {
  int64_t at, count, from;
};

// The taps that lie in the image for some of a panel's `count` places from `first` on, and what the columns find.
struct Found {
  std::vector<int64_t> taps;
  std::vector<std::vector<Piece>> pieces;

  Found(const ConvolutionSizes& s, const Columns& c, const Panel& panel, int64_t first, int64_t count,
        const std::vector<int64_t>& order) {
    const auto& [depth, height, line] = s.axes;
    const int64_t lanes = std::min(c.lanes, panel.width);  // of a place
    for (int64_t tap = 0; tap < s.taps(); ++tap) {
      std::vector<Piece> found;
      for (int64_t p = 0; p < count; ++p) {
        const int64_t place = order.empty() ? first + p : order[first + p], row = place / line.count;
        const int64_t z = s.input(0, row / height.count, tap / line.kernel / height.kernel);
        const int64_t y = s.input(1, row % height.count, tap / line.kernel % height.kernel);
        const int64_t x = s.input(2, place % line.count, tap % line.kernel);
        if (z < 0 || y < 0 || x < 0) continue;
        const int64_t at = p * lanes, from = ((z * height.size + y) * line.size + x) * c.lanes + panel.lane;
        Piece* last = found.empty() ? nullptr : &found.back();
        if (last && last->at + last->count == at && last->from + last->count == from) {
          last->count += lanes;
        } else {
          found.push_back({at, lanes, from});
        }
      }
      if (found.empty()) continue;
      taps.push_back(tap);
      pieces.push_back(std::move(found));
    }
  }
};

// turned [runs, step], each run [elements, lanes] of images [count, runs, elements], zeros in columns without an image
template <class T>
void turn(const T* images, int64_t count, int64_t runs, int64_t elements, int64_t lanes, int64_t step, T* turned) {
  constexpr int64_t kElements = 4096;
  const int64_t parts = ceil_div(elements, kElements);
  const int64_t grain = std::max<int64_t>(1, kElements / std::max<int64_t>(1, elements));
  torch::stable::parallel_for(0, runs * parts, grain, [&](int64_t a, int64_t b) {
    for (int64_t part = a; part < b; ++part) {
      const int64_t run = part / parts, from = part % parts * kElements, to = std::min(elements, from + kElements);
      const T* image = images + run * elements;
      T* turned_run = turned + run * step;
      if (lanes % vector_width<T>() == 0) {
        pack(image + from, runs * elements, count, to - from, lanes, turned_run + from * lanes);
        continue;
      }
      for (int64_t e = from; e < to; ++e) {
        const T* pixel = image + e;
        for (int64_t i = 0; i < lanes; ++i) {
          turned_run[e * lanes + i] = i < count ? pixel[i * runs * elements] : T(0);
        }
      }
    }
  });
}

// Mostly so few that a call would take longer
template <class T>
inline void copy_short(const T* from, int64_t count, T* to) {
  constexpr int64_t kRun = 8;
  int64_t j = 0;
  for (; j + kRun <= count; j += kRun) std::memcpy(to + j, from + j, kRun * sizeof(T));
  for (; j < count; ++j) to[j] = from[j];
}

// A row for each of `channels`: `pieces` of the turned image, zeros beside them
template <class T>
void copy_row(const std::vector<Piece>& pieces, const T* turned, int64_t channels, int64_t step, int64_t width,
              T* row) {
  int64_t covered = 0;
  for (const Piece& piece : pieces) covered += piece.count;
  for (int64_t c = 0; c < channels; ++c, turned += step, row += step) {
    if (covered < width) std::fill(row, row + width, T(0));
    for (const Piece& p : pieces) copy_short(turned + p.from, p.count, row + p.at);
  }
}

// to [*, step] += sums [places, lanes] turned, for `count` images; = without add. Place p goes to order[p], or to p.
template <class T, class E>
void write(const T* sums, int64_t lanes, int64_t count, int64_t places, T* turned, bool add, int64_t step,
           const int64_t* order, E* to) {
  const int64_t vector = vector_width<T>(), width = ceil_div(places, vector) * vector;
  const bool by_vectors = places >= vector;
  if (by_vectors) pack(sums, lanes, places, count, width, turned);
  for (int64_t i = 0; i < count; ++i, to += step) {
    const T* from = by_vectors ? turned + i * width : sums + i;
    const int64_t ld = by_vectors ? 1 : lanes;
    if (order != nullptr) {
      for (int64_t p = 0; p < places; ++p) {
        E& target = to[order[p]];
        target = static_cast<E>(add ? static_cast<T>(target) + from[p * ld] : from[p * ld]);
      }
    } else if (add) {
      for (int64_t p = 0; p < places; ++p) to[p] = static_cast<E>(static_cast<T>(to[p]) + from[p * ld]);
    } else {
      for (int64_t p = 0; p < places; ++p) to[p] = static_cast<E>(from[p * ld]);
    }
  }
}

// A part of the weight: filters of a group, or some groups as a whole.
struct Strip {
  int64_t group, groups, filter, filters;
};

// One weight [groups * filters, channels, taps], not transposed
template <class T>
struct Stored {
  const T* data;
  int64_t k = 1;
};

// Its k tangents, drawn
struct Drawn {
  const DrawSpec& spec;
  int64_t offset, k;
};

// What a thread takes of the weight at a time: [k, groups, filters, channels, taps] of the tangents, or [k, groups,
// channels, filters, taps] where transposed, as they lie in the weight. Several groups only with all that belongs to
// them. Of a stored weight all channels.
template <class T>
struct Strips {
  int64_t filters, channels, groups = 1;
  int64_t in_group, count;  // strips of a group; of all
  int64_t group_step, ld;   // elements from group to group; from tangent to tangent
  int64_t taps;
  bool transposed;

  // A thread takes a strip through a group of places, of which there are `place_groups`.
  Strips(const ConvolutionSizes& s, int64_t k, int64_t place_groups, bool drawn)
      : taps(s.taps()), transposed(s.transposed) {
    constexpr int64_t kBytes = sizeof(T);
    int64_t most = kTileRows * std::max<int64_t>(1, kStripRows / (kTileRows * k));
    if (s.transposed) most = std::max(most, ceil_div(kFewestDrawn, kTileRows * taps) * kTileRows);
    const int64_t tiles = std::max<int64_t>(1, ceil_div(s.filters, kTileRows));
    const int64_t wanted =
        ceil_div(2 * torch::stable::get_num_threads(), std::max<int64_t>(1, place_groups * s.groups));
    const int64_t parts = std::max(ceil_div(tiles * kTileRows, most), std::min(tiles, wanted));
    filters = std::clamp<int64_t>(s.filters, 1, ceil_div(tiles, parts) * kTileRows);
    // Normal elements are drawn 64 at a time.
    channels = std::max<int64_t>(1, kDrawnBytes / (k * filters * taps * kBytes));
    if (channels > kNormalGroup) channels = channels / kNormalGroup * kNormalGroup;
    channels = std::clamp<int64_t>(s.channels, 1, drawn ? channels : s.channels);
    group_step = filters * channels * taps;
    if (filters >= s.filters && channels >= s.channels) {
      groups =
          std::min(ceil_div(kFewestDrawn, group_step), std::max<int64_t>(1, kDrawnBytes / (k * group_step * kBytes)));
      groups = std::min(groups, s.groups);
    }
    ld = groups * group_step;
    in_group = ceil_div(s.filters, filters), count = in_group * ceil_div(s.groups, groups);
  }
  Strip at(const ConvolutionSizes& s, int64_t strip) const {
    const int64_t g = strip / in_group * groups, f = strip % in_group * filters;
    return {g, std::min(groups, s.groups - g), f, std::min(filters, s.filters - f)};
  }
  // Where in what is drawn, `some` channels of it, the next channel and the next filter lie
  int64_t channel_step() const { return transposed ? filters * taps : taps; }
  int64_t filter_step(int64_t some) const { return transposed ? taps : some * taps; }

  // Where in a weight `some` channels of a strip begin, from channel c0 of its group on: where they lie, or in `room`
  // once they are drawn.
  const T* of(const Stored<T>& w, const ConvolutionSizes& s, const Strip& strip, int64_t, int64_t, T*) const {
    return w.data + (strip.group * s.filters + strip.filter) * s.rows();
  }
  const T* of(const Drawn& w, const ConvolutionSizes& s, const Strip& strip, int64_t c0, int64_t some, T* room) const {
    draw(s, w, strip, c0, some, room);
    return room;
  }

  void draw(const ConvolutionSizes& s, const Drawn& w, const Strip& strip, int64_t c0, int64_t some, T* room) const {
    const int64_t start = w.offset + strip.group * s.filters * s.rows();
    if (transposed) {
      const int64_t from = start + (c0 * s.filters + strip.filter) * taps, step = s.filters * taps;
      if (filters == s.filters) return frog::draw(w.spec, w.k, from, strip.groups * some * step, room, ld);
      for (int64_t c = 0; c < some; ++c) {
        frog::draw(w.spec, w.k, from + c * step, strip.filters * taps, room + c * channel_step(), ld);
      }
    } else {
      const int64_t from = start + strip.filter * s.rows() + c0 * taps, length = some * taps;
      if (some == s.channels) return frog::draw(w.spec, w.k, from, strip.groups * strip.filters * length, room, ld);
      for (int64_t f = 0; f < strip.filters; ++f) {
        frog::draw(w.spec, w.k, from + f * s.rows(), length, room + f * length, ld);
      }
    }
  }
};

// The places of a transposed convolution in the order they are worked on: those a stride apart, which find the same
// taps, follow each other. Empty: as they come.
inline std::vector<int64_t> order_of(const ConvolutionSizes& s) {
  const auto& [depth, height, line] = s.axes;
  std::vector<int64_t> order;
  if (!s.transposed || depth.stride * height.stride * line.stride == 1) return order;
  order.reserve(s.outputs());
  const auto along = [](const WindowAxis& a) {
    std::vector<int64_t> places;
    for (int64_t phase = 0; phase < std::min(a.stride, a.count); ++phase) {
      for (int64_t j = phase; j < a.count; j += a.stride) places.push_back(j);
    }
    return places;
  };
  const std::vector<int64_t> rows = along(height), columns = along(line);
  for (const int64_t z : along(depth)) {
    for (const int64_t y : rows) {
      for (const int64_t x : columns) order.push_back((z * height.count + y) * line.count + x);
    }
  }
  return order;
}

// self (+)= of `count` images from `first_image` on
template <class T, class Weight, class E>
void convolve_some(const ConvolutionSizes& s, const Weight& weight, const T* x, int64_t first_image, int64_t count,
                   bool add, E* self) {
  constexpr int64_t kBytes = sizeof(T);
  const Columns c(count, panel_width<T>(), vector_width<T>());
  const std::vector<int64_t> order = order_of(s);
  constexpr bool kDrawn = std::is_same_v<Weight, Drawn>;
  const int64_t k = weight.k, all_channels = s.groups * s.channels, all_filters = s.groups * s.filters;
  const int64_t taps = s.taps(), outputs = s.outputs(), columns = c.size();
  const int64_t groups = ceil_div(outputs, c.group), panels = c.panels;
  const Strips<T> strips(s, k, groups, kDrawn);
  const int64_t copied = c.places > 1 ? taps * c.width : 0;  // elements of a channel that a panel may have to copy
  const int64_t listed_panel = strips.channels * taps;
  const int64_t group_bytes = panels * (all_channels * copied * kBytes + listed_panel * sizeof(Listed));
  const int64_t fitting = kCopiedBytes / std::max<int64_t>(1, group_bytes);
  const bool at_once = strips.channels >= s.channels;  // sums are complete before the next group of places
  const int64_t held = k * strips.filters * columns;   // sums of a group of places
  int64_t together = std::min(groups, std::max(fitting, ceil_div(kFewestColumns, columns)));
  if (!at_once) together = std::clamp<int64_t>(kSumsBytes / (held * kBytes), 1, together);
  const int64_t steps = kPanelBytes / (c.width * kBytes);
  const int64_t products = k * strips.groups * strips.filters * s.rows() * columns;
  const int64_t grain = std::max<int64_t>(1, kTaskProducts / std::max<int64_t>(1, products));

  // Of each channel its turned images, and behind them what is copied
  const int64_t whole = s.inputs() * c.lanes, step = whole + together * panels * copied;
  Scratch<T> turned(all_channels * step);
  Scratch<Listed> listed(together * panels * listed_panel);  // of each panel: its rows, and the elements of a filter
  std::vector<int64_t> found(together * panels);             // taps of each panel
  const T* images = x + first_image * all_channels * s.inputs();
  if (copied > 0) {
    turn(images, count, all_channels, s.inputs(), c.lanes, step, turned.data());
  } else {  // channels follow each other, so that few places do not make for short runs
    turn(images, count, 1, all_channels * s.inputs(), c.lanes, 0, turned.data());
  }
  for (int64_t g0 = 0; g0 < groups; g0 += together) {
    const int64_t here = std::min(together, groups - g0);
    torch::stable::parallel_for(0, here * panels, 1, [&](int64_t from, int64_t to) {
      for (int64_t p = from; p < to; ++p) {
        const Panel panel(c, p);
        const int64_t place = g0 * c.group + panel.place;
        const Found f(s, c, panel, place, std::clamp<int64_t>(outputs - place, 0, c.places), order);
        const int64_t n = found[p] = static_cast<int64_t>(f.taps.size());
        Listed* list = listed.data() + p * listed_panel;
        for (int64_t j = 0; j < n; ++j) {
          const std::vector<Piece>& pieces = f.pieces[j];
          int64_t at = pieces[0].from;
          if (pieces.size() > 1 || pieces[0].count < panel.width) {
            at = whole + p * copied + j * c.width;
            copy_row(pieces, turned.data(), all_channels, step, panel.width, turned.data() + at);
          }
          for (int64_t channel = 0; channel < strips.channels; ++channel) {
            list[channel * n + j] = {channel * step + at, channel * strips.channel_step() + f.taps[j]};
          }
        }
      }
    });
    // sum [k, filters, columns] (+)= the products of one group's channels c0 .. c0 + some, in group g of the places
    const auto multiply = [&](const T* part, int64_t n, int64_t channel, int64_t some, int64_t g, bool fresh, T* sum) {
      const int64_t next = strips.filter_step(some);
      const bool at_equal_steps = n == 1 || strips.ld == n * next;  // from filter to filter, through all tangents
      const int64_t calls = at_equal_steps ? 1 : k, v_ld = n == 1 ? strips.ld : next;
      for (int64_t p = g * panels; p < (g + 1) * panels; ++p) {
        const Panel panel(c, p);
        const int64_t depth = found[p] * some, column = (panel.place - g * c.group) * c.lanes + panel.lane;
        const Listed* list = listed.data() + p * listed_panel;
        for (int64_t r = 0; r == 0 || r < depth; r += steps) {
          for (int64_t i = 0; i < calls; ++i) {
            tile_listed(turned.data() + channel * step, panel.width, part + i * strips.ld, v_ld, list + r,
                        k / calls * n, std::min(steps, depth - r), sum + i * n * columns + column, columns,
                        fresh && r == 0);
          }
        }
      }
    };
    // The sums of group j of a strip, which are complete, to where they belong
    const auto finish = [&](const T* sum, const Strip& strip, int64_t j, int64_t g, T* across) {
      const int64_t place = (g0 + g) * c.group, live = std::min(c.group, outputs - place);
      const int64_t filter = (strip.group + j) * s.filters + strip.filter;
      for (int64_t i = 0; i < k; ++i) {
        for (int64_t f = 0; f < strip.filters; ++f, sum += columns) {
          E* image = self + ((i * s.images + first_image) * all_filters + filter + f) * outputs;
          write(sum, c.lanes, count, live, across, add, all_filters * outputs,
                order.empty() ? nullptr : order.data() + place, order.empty() ? image + place : image);
        }
      }
    };
    // A unit of work is a strip of the weight times a group of places
    torch::stable::parallel_for(0, strips.count * here, grain, [&](int64_t from, int64_t to) {
      Scratch<T> drawn(kDrawn ? k * strips.ld : 0), sums(held * (at_once ? 1 : here));
      Scratch<T> across(c.lanes * ceil_div(c.group, vector_width<T>()) * vector_width<T>());
      for (int64_t unit = from; unit < to; unit = (unit / here + 1) * here) {
        const Strip strip = strips.at(s, unit / here);
        const int64_t first = unit % here, last = std::min(here, first + to - unit);
        for (int64_t c0 = 0; c0 == 0 || c0 < s.channels; c0 += strips.channels) {
          const int64_t some = std::min(strips.channels, s.channels - c0);
          const T* part = strips.of(weight, s, strip, c0, some, drawn.data());
          for (int64_t g = first; g < last; ++g) {
            T* sum = sums.data() + (at_once ? 0 : g * held);
            for (int64_t j = 0; j < strip.groups; ++j) {
              const int64_t channel = (strip.group + j) * s.channels + c0;
              multiply(part + j * strips.group_step, strip.filters, channel, some, g, c0 == 0, sum);
              if (c0 + strips.channels >= s.channels) finish(sum, strip, j, g, across.data());
            }
          }
        }
      }
    });
  }
}

// self [k, images, all filters, *] (+)= conv(x, dW_i), some images after the other
template <class T, class Weight, class E>
void convolve(const ConvolutionSizes& s, const Weight& weight, const T* x, bool add, E* self) {
  int64_t most = kImages;
  if constexpr (!std::is_same_v<Weight, Drawn>) {  // a weight that comes from memory serves as many as stay in cache
    const int64_t bytes = s.groups * s.channels * s.inputs() * static_cast<int64_t>(sizeof(T));
    most = std::clamp(kTurnedBytes / std::max<int64_t>(1, bytes) / kImages * kImages, kImages, kMostImages);
  }
  for (int64_t first = 0; first < s.images; first += most) {
    convolve_some(s, weight, x, first, std::min(most, s.images - first), add, self);
  }
}

}  // namespace frog::direct
